//! One coalesced fill of one blob: whoever comes first starts it, everybody reads it, nobody owns it.
//!
//! Invariants:
//! - At most one flight per digest is in the map, and a blob is kept before its flight leaves the map. So a look-up that
//!   re-checks the tiers under the map's lock either finds the blob, joins the flight, or is right to start one.
//! - A fill runs in a task of its own. A client that leaves takes nobody down; a panic fails the flight instead of stranding it.
//! - Unverified bytes leave only as the front of a response that cannot complete: the last [`HOLD_BACK`] bytes of every
//!   response wait until all of the blob has verified.
//!
//! An absent blob's flight stays in the map for `limits.negative_ttl`: that is the negative cache.

mod attempts;
mod reader;
mod writer;

pub use reader::{Opened, Reader};
pub use writer::{grow, tier_file};

use crate::{
    disk::{Disk, DiskFile},
    fault::{Fault, Limit},
    memory::Memory,
    metrics::{Metrics, Outcome},
    spool::{self, Room, Spool},
    upstream::{Incoming, Upstream},
};
use arc_swap::ArcSwap;
use attempts::Attempts;
use bytes::Bytes;
use castier_blob::{Digest, Verifier};
use castier_config as config;
use futures::FutureExt;
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{Notify, Semaphore, watch};
use writer::Writer;

/// How much of the end of every response waits for the digest.
pub const HOLD_BACK: u64 = 64 << 10;
/// All flights of this node, and what they need to fly.
pub struct Flights {
    map: Mutex<HashMap<Digest, Arc<Flight>>>,
    /// Absences being remembered: flights in the map that have ended.
    remembered: AtomicUsize,
    places: Semaphore,
    room: Room,
    memory: Arc<Memory>,
    disk: Option<Arc<Disk>>,
    origin: Arc<Upstream>,
    retries: usize,
    max_wait: Duration,
    finish_under: u64,
    buffer_up_to: u64,
    limits: Arc<ArcSwap<config::Limits>>,
    metrics: Arc<Metrics>,
}

/// What [`Flights::join`] found.
pub enum Joined {
    /// The blob has landed in memory meanwhile.
    Kept(Bytes),
    /// The blob has landed on disk meanwhile.
    OnDisk,
    /// This request started the flight.
    Led(Reader),
    /// Another had started it.
    Followed(Reader),
}

struct Flight {
    digest: Digest,
    state: Mutex<State>,
    /// Told after every change of `state`.
    tick: watch::Sender<()>,
    /// Changed only under the map's lock when it grows, so that an empty flight can be abandoned without a race.
    readers: AtomicUsize,
    /// Told when the last reader has gone.
    deserted: Notify,
}

struct State {
    phase: Phase,
    spool: Spool,
    /// The blob's size as the source announced it.
    size: Option<u64>,
    /// Unverified bytes have been handed out, so the flight can no longer start over.
    released: bool,
    /// Purged or overtaken by an upload: what comes out must not be remembered.
    detached: bool,
}

#[derive(Clone)]
enum Phase {
    /// No source has answered yet.
    Opening,
    Filling,
    Verified,
    Absent,
    Failed(Fault),
}

impl Flights {
    /// No flights yet. Every bound is as configured.
    pub fn new(
        config: &config::Castier,
        limits: Arc<ArcSwap<config::Limits>>,
        tiers: (Arc<Memory>, Option<Arc<Disk>>),
        origin: Arc<Upstream>,
        room: Room,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        let (memory, disk) = tiers;
        Arc::new(Self {
            map: Mutex::default(),
            remembered: AtomicUsize::new(0),
            places: Semaphore::new(config.fill.max_in_flight),
            room,
            memory,
            disk,
            origin,
            retries: config.origin.retries as usize,
            max_wait: config.fill.max_wait.get(),
            finish_under: config.fill.finish_under.get(),
            buffer_up_to: config.verify.buffer_up_to.get(),
            limits,
            metrics,
        })
    }

    /// Joins the flight of a blob that the tiers did not have, or starts it. With `sure`, what the disk's index says is passed over: it has
    /// been looked at, and was wrong.
    pub fn join(self: &Arc<Self>, digest: &Digest, sure: bool) -> Joined {
        let mut map = self.map.lock();
        if let Some(flight) = map.get(digest) {
            return Joined::Followed(Reader::new(self, flight.clone(), true));
        }
        // Since the first look-up a flight may have come and gone.
        if let Some(bytes) = self.memory.find(digest) {
            return Joined::Kept(bytes);
        }
        if !sure && self.disk.as_ref().is_some_and(|disk| disk.knows(digest).is_some()) {
            return Joined::OnDisk;
        }
        let flight = Arc::new(Flight {
            digest: *digest,
            state: Mutex::new(State { phase: Phase::Opening, spool: Spool::default(), size: None, released: false, detached: false }),
            tick: watch::Sender::new(()),
            readers: AtomicUsize::new(0),
            deserted: Notify::new(),
        });
        map.insert(*digest, flight.clone());
        let reader = Reader::new(self, flight.clone(), false);
        drop(map);
        tokio::spawn(self.clone().fly(flight));
        Joined::Led(reader)
    }

    /// What flights know of a blob without asking anybody: its size, or that it is absent.
    pub fn peek(&self, digest: &Digest) -> Option<Option<u64>> {
        let flight = self.map.lock().get(digest)?.clone();
        let state = flight.state.lock();
        match state.phase {
            Phase::Absent => Some(None),
            Phase::Verified => Some(Some(state.spool.length())),
            _ => None,
        }
    }

    /// The blob was stored: an absence that is remembered, or about to be, is no longer true.
    pub fn stored(&self, digest: &Digest) {
        self.detach_if(digest, |phase| matches!(phase, Phase::Opening | Phase::Absent));
    }

    /// The blob must not be remembered. Whoever reads it may go on.
    pub fn forget(&self, digest: &Digest) {
        self.detach_if(digest, |_| true);
    }

    fn detach_if(&self, digest: &Digest, which: impl Fn(&Phase) -> bool) {
        let mut map = self.map.lock();
        let Some(flight) = map.get(digest) else { return };
        let mut state = flight.state.lock();
        if which(&state.phase) {
            state.detached = true;
            drop(state);
            map.remove(digest);
        }
    }

    /// Runs a flight from start to end, whatever happens on the way.
    async fn fly(self: Arc<Self>, flight: Arc<Flight>) {
        let started = Instant::now();
        self.metrics.flights_in_progress.inc();
        let phase = match AssertUnwindSafe(self.fill(&flight)).catch_unwind().await {
            Ok(Ok(phase)) => phase,
            Ok(Err(fault)) => Phase::Failed(fault),
            Err(_) => Phase::Failed(Fault::Internal("the fill panicked".into())),
        };
        let outcome = match &phase {
            Phase::Absent => Outcome::Absent,
            Phase::Failed(fault) => {
                log_failure(&flight.digest, fault);
                Outcome::Error
            }
            _ => Outcome::Ok,
        };
        self.metrics.source_load(self.origin.name, outcome, started.elapsed());
        self.metrics.flights_in_progress.dec();
        let ttl = self.limits.load().negative_ttl.get();
        let remember =
            matches!(phase, Phase::Absent) && !ttl.is_zero() && self.remembered.load(Ordering::Relaxed) < self.limits.load().max_negative;
        let on_disk = self.disk.as_ref().is_some_and(|disk| disk.knows(&flight.digest).is_some());
        let passing = matches!(phase, Phase::Verified) && !on_disk && flight.state.lock().spool.parts().is_none();
        flight.update(|state| state.phase = phase);
        if passing {
            // No tier keeps it, but its readers do: as long as one reads, a late comer can, and the origin is not asked again.
            while !self.remove_if_deserted(&flight) {
                flight.deserted.notified().await;
            }
            return;
        }
        if remember {
            self.remembered.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(ttl).await;
            self.remembered.fetch_sub(1, Ordering::Relaxed);
        }
        take_out(&mut self.map.lock(), &flight);
    }

    /// Takes the flight out of the map if nobody reads it. Nobody joins while the map is locked.
    fn remove_if_deserted(&self, flight: &Arc<Flight>) -> bool {
        let mut map = self.map.lock();
        let deserted = flight.readers.load(Ordering::Acquire) == 0;
        if deserted {
            take_out(&mut map, flight);
        }
        deserted
    }

    /// Gets the blob from a source, verifies and keeps it.
    async fn fill(&self, flight: &Arc<Flight>) -> Result<Phase, Fault> {
        let _place = match tokio::time::timeout(self.max_wait, self.places.acquire()).await {
            Ok(Ok(place)) => place,
            _ => return Err(Fault::Busy(Limit::Fills)),
        };
        let mut verifier = Verifier::of(flight.digest);
        let mut writer = Writer::default();
        let mut attempts = Attempts::new(self.retries);
        let mut may_start_over = true;
        loop {
            let fault = match self.pour(flight, &mut verifier, &mut writer).await {
                Ok(false) if verifier.seen() == 0 => return Ok(Phase::Absent),
                Ok(false) => Fault::Unusable { source_name: self.origin.name, why: "the blob vanished midway".into() },
                Ok(true) => {
                    let file = writer.finish(self, flight).await?;
                    let fault = match self.land(flight, verifier, file).await {
                        Ok(()) => return Ok(Phase::Verified),
                        Err(fault) => fault,
                    };
                    if !may_start_over || !flight.start_over() {
                        return Err(fault);
                    }
                    may_start_over = false;
                    (verifier, writer) = (Verifier::of(flight.digest), Writer::default());
                    tracing::warn!(digest = %flight.digest, %fault, "corrupt fill, trying once more from the start");
                    continue;
                }
                Err(fault) => fault,
            };
            let Some(delay) = attempts.after(&fault, verifier.seen()) else { return Err(fault) };
            tracing::debug!(digest = %flight.digest, %fault, at = verifier.seen(), "transfer broke, going on");
            tokio::time::sleep(delay).await;
            if verifier.seen() > 0 {
                self.metrics.source_resume(self.origin.name);
            }
        }
    }

    /// Opens the source where the last transfer ended and takes all that comes; false if it says that the blob is absent.
    async fn pour(&self, flight: &Arc<Flight>, verifier: &mut Verifier, writer: &mut Writer) -> Result<bool, Fault> {
        let Some(mut incoming) = self.origin.open(&flight.digest, verifier.seen()).await? else { return Ok(false) };
        let size = self.begin(flight, &incoming)?;
        loop {
            if size == Some(verifier.seen()) {
                incoming.release().await;
                return Ok(true);
            }
            let next = incoming.next();
            tokio::pin!(next);
            let chunk = loop {
                // Checked before waiting, since the last reader may have left before anyone listened.
                if self.abandon(flight, size, verifier.seen()) {
                    return Err(Fault::Abandoned);
                }
                tokio::select! {
                    chunk = &mut next => break chunk?,
                    () = flight.deserted.notified() => {}
                }
            };
            let Some(chunk) = chunk else {
                let broke = |_| Fault::Unreachable { source_name: self.origin.name, why: "ended before the announced length".into() };
                return size.map_or(Ok(true), |size| Err(broke(size)));
            };
            let seen = verifier.seen() + chunk.len() as u64;
            let limit = self.limits.load().max_blob.get();
            if seen > size.unwrap_or(limit) {
                return Err(Fault::Unusable {
                    source_name: self.origin.name,
                    why: format!("more bytes than the {} announced or allowed", size.unwrap_or(limit)),
                });
            }
            verifier.update(&chunk);
            writer.append(self, flight, chunk).await?;
        }
    }

    /// Takes note of what the source announced, and holds it to what was announced before.
    fn begin(&self, flight: &Flight, incoming: &Incoming) -> Result<Option<u64>, Fault> {
        let unusable = |why: String| Fault::Unusable { source_name: self.origin.name, why };
        let limit = self.limits.load().max_blob.get();
        if let Some(size) = incoming.size.filter(|size| *size > limit) {
            return Err(unusable(format!("a blob of {size} bytes, over limits.max_blob")));
        }
        flight.update(|state| {
            if let (Some(before), Some(now)) = (state.size, incoming.size)
                && before != now
            {
                return Err(unusable(format!("announced {before} bytes first and {now} now")));
            }
            state.size = state.size.or(incoming.size);
            if matches!(state.phase, Phase::Opening) {
                state.phase = Phase::Filling;
                state.spool = Spool::new(&self.room, state.size);
            }
            Ok(state.size)
        })
    }

    /// All bytes are in. Keeps the blob if it is the right one.
    async fn land(&self, flight: &Flight, verifier: Verifier, file: Option<DiskFile>) -> Result<(), Fault> {
        // Put together off the lock: the fill is the only writer.
        let whole = flight.state.lock().spool.parts().map(spool::join);
        let corrupt = |mismatch| {
            self.metrics.corrupt(self.origin.name);
            Fault::Corrupt { source_name: self.origin.name, mismatch }
        };
        let verified = verifier.finish(()).map_err(corrupt)?;
        let keeping = {
            // Under the lock, so that a purge comes either before (and is seen here) or after (and finds the blob in the tier).
            let mut state = flight.state.lock();
            if let Some(whole) = &whole {
                state.spool.settle(whole.clone());
            }
            match (whole, file, &self.disk) {
                _ if state.detached => None,
                (Some(whole), _, disk) => {
                    let blob = verified.with_content(whole);
                    if let Some(disk) = disk {
                        disk.keep_later(blob.clone());
                    }
                    self.memory.keep(blob);
                    None
                }
                (None, Some(file), Some(disk)) => Some(disk.keep_file(verified.with_content(file))),
                _ => None,
            }
        };
        if let Some(keeping) = keeping {
            keeping.await;
        }
        Ok(())
    }

    /// Ends a flight that nobody reads and that has too far to go.
    fn abandon(&self, flight: &Arc<Flight>, size: Option<u64>, seen: u64) -> bool {
        if flight.readers.load(Ordering::Acquire) > 0 || size.is_some_and(|size| size.saturating_sub(seen) <= self.finish_under) {
            return false;
        }
        self.remove_if_deserted(flight)
    }
}

/// Once detached, another flight may stand in its place.
fn take_out(map: &mut HashMap<Digest, Arc<Flight>>, flight: &Arc<Flight>) {
    if map.get(&flight.digest).is_some_and(|current| Arc::ptr_eq(current, flight)) {
        map.remove(&flight.digest);
    }
}

fn log_failure(digest: &Digest, fault: &Fault) {
    match fault {
        Fault::Abandoned => tracing::debug!(%digest, "flight abandoned by its last reader"),
        Fault::Internal(_) => tracing::error!(%digest, %fault, "fill failed"),
        _ => tracing::warn!(%digest, %fault, "fill failed"),
    }
}

impl Flight {
    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock());
        self.tick.send_replace(());
        result
    }

    /// Back to byte 0, if no reader has been given anything.
    fn start_over(&self) -> bool {
        self.update(|state| {
            if !state.released {
                state.phase = Phase::Opening;
                state.size = None;
                state.spool = Spool::default();
            }
            !state.released
        })
    }
}
