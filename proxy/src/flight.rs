//! One coalesced fill of one blob: whoever comes first starts it, everybody reads it, nobody owns it.
//!
//! Invariants:
//! - At most one flight per digest is in the map, and a blob is kept before its flight leaves the map. So a look-up that
//!   re-checks the tiers under the map's lock either finds the blob, joins the flight, or is right to start one.
//! - A fill runs in a task of its own. A client that leaves takes nobody down; a panic fails the flight instead of stranding it.
//! - Unverified bytes leave only as the front of a response that cannot complete: the last [`HOLD_BACK`] bytes of every
//!   response wait until all of the blob has verified.
//! - No two flights wait for each other, on whatever nodes: see [`course`].
//!
//! An absent blob's flight stays in the map for `limits.negative_ttl`: that is the negative cache.

mod attempts;
mod course;
mod fill;
mod reader;
mod tiers;
mod writer;

pub use reader::{Opened, Reader};
pub use tiers::Tiers;

use crate::{
    disk::DiskFile,
    fault::Fault,
    metrics::{Metrics, Outcome},
    spool::{self, Room, Spool},
    tier::TierName,
    trace,
    upstream::{Incoming, Sources},
    via,
};
use arc_swap::ArcSwap;
use bytes::Bytes;
use castier_blob::{Digest, Verified, Verifier};
use castier_config as config;
use course::Leg;
use fill::End;
use futures::FutureExt;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
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
    /// Flights that have not ended, in the order in which they began.
    going: Mutex<BTreeMap<u64, Arc<Flight>>>,
    /// How many have begun.
    begun: AtomicU64,
    /// Absences being remembered: flights in the map that have ended.
    remembered: AtomicUsize,
    places: Semaphore,
    room: Room,
    tiers: Tiers,
    sources: Sources,
    retries: usize,
    max_wait: Duration,
    finish_under: u64,
    buffer_up_to: u64,
    limits: Arc<ArcSwap<config::Limits>>,
    metrics: Arc<Metrics>,
}

/// Who asks. What a peer asks for is answered from the tiers, a flight or the origin, and never handed on to another peer, whatever the
/// two nodes believe about the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A client, at the public listener; or this node itself.
    Client,
    /// Another node of the cluster.
    Peer,
}

/// What [`Flights::join`] found.
pub enum Joined {
    /// The blob has landed in memory meanwhile, in this part of it.
    Kept(Bytes, TierName),
    /// The blob has landed on disk meanwhile.
    OnDisk,
    /// This request started the flight.
    Led(Reader),
    /// Another had started it.
    Followed(Reader),
}

/// A flight as operators see it.
#[derive(Clone, Debug)]
pub struct Going {
    /// What is being fetched.
    pub digest: Digest,
    /// How much of it has come.
    pub bytes: u64,
    /// The blob's size, as far as it is known.
    pub size: Option<u64>,
    /// How long it has been on its way.
    pub age: Duration,
    /// How many requests read it.
    pub readers: usize,
    /// Where the bytes come from now: `origin` or `peer`.
    pub from: &'static str,
}

struct Flight {
    digest: Digest,
    started: Instant,
    state: Mutex<State>,
    /// Told after every change of `state`.
    tick: watch::Sender<()>,
    /// Changed only under the map's lock when it grows, so that an empty flight can be abandoned without a race.
    readers: AtomicUsize,
    /// Tells the fill to look up: the last reader has gone, or the flight has been turned home.
    nudge: Notify,
}

struct State {
    phase: Phase,
    spool: Spool,
    /// The blob's size as the source announced it.
    size: Option<u64>,
    /// Unverified bytes have been handed out, so the flight can no longer start over.
    released: bool,
    /// Where the bytes come from now.
    leg: Leg,
    /// Peers are not to be waited for; see [`course`].
    home: bool,
    /// Purged or overtaken by an upload: what comes out must not be remembered.
    detached: bool,
    /// The spool's file is one that the disk tier will keep.
    on_tier_file: bool,
    /// The blob has verified, and a tier has it.
    kept: bool,
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
        tiers: Tiers,
        sources: Sources,
        room: Room,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            map: Mutex::default(),
            going: Mutex::default(),
            begun: AtomicU64::new(0),
            remembered: AtomicUsize::new(0),
            places: Semaphore::new(config.fill.max_in_flight),
            room,
            tiers,
            sources,
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
    pub fn join(self: &Arc<Self>, digest: &Digest, asker: Asker, sure: bool) -> Joined {
        let mut map = self.map.lock();
        if let Some(flight) = map.get(digest) {
            if asker == Asker::Peer {
                flight.turn_home();
            }
            return Joined::Followed(Reader::new(self, flight.clone(), asker, true));
        }
        // Since the first look-up a flight may have come and gone.
        if let Some((bytes, tier)) = self.tiers.in_memory_settled(digest) {
            return Joined::Kept(bytes, tier);
        }
        if !sure && self.tiers.disk.as_ref().is_some_and(|disk| disk.offers(digest)) {
            return Joined::OnDisk;
        }
        let flight = Arc::new(Flight {
            digest: *digest,
            started: Instant::now(),
            state: Mutex::new(State::new(asker == Asker::Peer)),
            tick: watch::Sender::new(()),
            readers: AtomicUsize::new(0),
            nudge: Notify::new(),
        });
        map.insert(*digest, flight.clone());
        let reader = Reader::new(self, flight.clone(), asker, false);
        drop(map);
        tokio::spawn(via::carry(trace::carry(self.clone().fly(flight))));
        Joined::Led(reader)
    }

    /// Whether a flight of the blob is on its way.
    pub fn is_flying(&self, digest: &Digest) -> bool {
        let Some(flight) = self.map.lock().get(digest).cloned() else { return false };
        matches!(flight.state.lock().phase, Phase::Opening | Phase::Filling)
    }

    /// How many flights have not ended, and those that have been on their way for the longest.
    pub fn going(&self, most: usize) -> (usize, Vec<Going>) {
        let (count, oldest) = {
            let going = self.going.lock();
            (going.len(), going.values().take(most).cloned().collect::<Vec<_>>())
        };
        let going = oldest.iter().map(|flight| {
            let state = flight.state.lock();
            Going {
                digest: flight.digest,
                bytes: state.spool.length(),
                size: state.size,
                age: flight.started.elapsed(),
                readers: flight.readers.load(Ordering::Relaxed),
                from: state.leg.source(),
            }
        });
        (count, going.collect())
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
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        self.going.lock().insert(number, flight.clone());
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
        let source = flight.state.lock().leg.source();
        self.metrics.source_load(source, outcome, flight.started.elapsed());
        self.going.lock().remove(&number);
        self.metrics.flights_in_progress.dec();
        let ttl = self.limits.load().negative_ttl.get();
        // What a peer has heard from the origin is the peer's to remember: an upload that comes there ends it for all.
        let own_absence = matches!(phase, Phase::Absent) && source == Leg::Origin.source();
        let remember = own_absence && !ttl.is_zero() && self.remembered.load(Ordering::Relaxed) < self.limits.load().max_negative;
        let passing = {
            let state = flight.state.lock();
            // A tier that hangs has the blob, and cannot give it.
            let kept = state.kept && self.tiers.disk.as_ref().is_none_or(|disk| disk.offers(&flight.digest));
            matches!(phase, Phase::Verified) && !kept && state.spool.parts().is_none()
        };
        flight.update(|state| state.phase = phase);
        if passing {
            // No tier keeps it, but its readers do: as long as one reads, a late comer can, and the origin is not asked again.
            while !self.remove_if_deserted(&flight) {
                flight.nudge.notified().await;
            }
            return;
        }
        if remember {
            self.remembered.fetch_add(1, Ordering::Relaxed);
            // In a task of its own: this one's future is as large as a whole fill, and absences are many.
            tokio::spawn(self.clone().remember(flight, ttl));
            return;
        }
        take_out(&mut self.map.lock(), &flight);
    }

    /// The flight's file cannot be read any more, so nobody shall join it.
    fn give_up_file(&self, flight: &Arc<Flight>) {
        take_out(&mut self.map.lock(), flight);
    }

    /// Keeps an absence in the map for so long.
    async fn remember(self: Arc<Self>, flight: Arc<Flight>, ttl: Duration) {
        tokio::time::sleep(ttl).await;
        self.remembered.fetch_sub(1, Ordering::Relaxed);
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

    /// Takes all that comes.
    /// `before` has seen what was handed out already, if that is fetched once more.
    async fn pour(
        &self,
        flight: &Arc<Flight>,
        mut incoming: Incoming,
        verifier: &mut Verifier,
        before: Option<&Verifier>,
        writer: &mut Writer,
    ) -> Result<End, Fault> {
        let source_name = incoming.source_name();
        let size = self.begin(flight, &incoming)?;
        loop {
            if size == Some(verifier.seen()) {
                incoming.release().await;
                return Ok(End::Whole);
            }
            let next = incoming.next();
            tokio::pin!(next);
            let chunk = loop {
                // Checked before waiting, since the last reader may have left before anyone listened.
                if self.abandon(flight, size, verifier.seen()) {
                    return Err(Fault::Abandoned);
                }
                if flight.must_turn() {
                    return Ok(End::Elsewhere);
                }
                tokio::select! {
                    chunk = &mut next => break chunk?,
                    () = flight.nudge.notified() => {}
                }
            };
            let Some(chunk) = chunk else {
                let broke = |_| Fault::Unreachable { source_name, why: "ended before the announced length".into() };
                return size.map_or(Ok(End::Whole), |size| Err(broke(size)));
            };
            let seen = verifier.seen() + chunk.len() as u64;
            let limit = self.limits.load().max_blob.get();
            if seen > size.unwrap_or(limit) {
                return Err(Fault::Unusable {
                    source_name,
                    why: format!("more bytes than the {} announced or allowed", size.unwrap_or(limit)),
                });
            }
            if let Some(before) = before.filter(|before| (verifier.seen()..=seen).contains(&before.seen())) {
                // Here the bytes end that were handed out before they were lost. These must be the same.
                let mut again = verifier.clone();
                again.update(&chunk[..(before.seen() - verifier.seen()) as usize]);
                if hash(&again) != hash(before) {
                    return Err(Fault::Unusable { source_name, why: "other bytes than the first time".into() });
                }
            }
            verifier.update(&chunk);
            writer.append(self, flight, chunk).await?;
        }
    }

    /// Takes note of what the source announced, and holds it to what was announced before.
    fn begin(&self, flight: &Flight, incoming: &Incoming) -> Result<Option<u64>, Fault> {
        let unusable = |why: String| Fault::Unusable { source_name: incoming.source_name(), why };
        let limit = self.limits.load().max_blob.get();
        if let Some(size) = incoming.size.filter(|size| *size > limit) {
            return Err(unusable(format!("a blob of {size} bytes, over limits.max_blob")));
        }
        flight.update(|state| {
            if state.spool.length() == 0 {
                (state.phase, state.spool) = (Phase::Filling, Spool::new(&self.room, incoming.size));
                if !state.released {
                    // Whatever was announced before, nothing came of it.
                    state.size = incoming.size;
                }
            }
            if let (Some(before), Some(now)) = (state.size, incoming.size)
                && before != now
            {
                return Err(unusable(format!("announced {before} bytes first and {now} now")));
            }
            state.size = state.size.or(incoming.size);
            Ok(state.size)
        })
    }

    /// Keeps the blob, unless it has been purged meanwhile.
    async fn settle(&self, flight: &Flight, verified: Verified<()>, file: Option<DiskFile>) {
        // Put together off the lock: the fill is the only writer.
        let whole = flight.state.lock().spool.parts().map(spool::join);
        let keeping = {
            // Under the lock, so that a purge comes either before (and is seen here) or after (and finds the blob in the tier).
            let mut state = flight.state.lock();
            if let Some(whole) = &whole {
                state.spool.settle(whole.clone());
            }
            match (whole, file, &self.tiers.disk) {
                _ if state.detached => None,
                (Some(whole), ..) => {
                    if let Some(shared) = self.tiers.keep(verified.with_content(whole), state.leg.is_foreign()) {
                        // The tier pays for the bytes from now on, also for those who still read them here.
                        state.spool.settle(shared);
                        state.spool.release();
                        state.kept = true;
                    }
                    None
                }
                (None, Some(file), Some(disk)) if !state.leg.is_foreign() => Some((disk, disk.keep_file(verified.with_content(file)))),
                _ => None,
            }
        };
        if let Some((disk, keeping)) = keeping {
            keeping.await;
            flight.state.lock().kept = disk.knows(&flight.digest).is_some();
        }
    }

    /// Ends a flight that nobody reads and that has too far to go.
    fn abandon(&self, flight: &Arc<Flight>, size: Option<u64>, seen: u64) -> bool {
        if flight.readers.load(Ordering::Acquire) > 0 || size.is_some_and(|size| size.saturating_sub(seen) <= self.finish_under) {
            return false;
        }
        self.remove_if_deserted(flight)
    }
}

/// The digest of what a verifier has seen so far.
fn hash(verifier: &Verifier) -> Digest {
    verifier.clone().finish(()).map_or_else(|mismatch| mismatch.actual, |verified| verified.digest())
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

impl State {
    fn new(home: bool) -> Self {
        let leg = Leg::Origin;
        let (phase, spool) = (Phase::Opening, Spool::default());
        Self { phase, spool, size: None, released: false, leg, home, detached: false, on_tier_file: false, kept: false }
    }
}

impl Flight {
    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock());
        self.tick.send_replace(());
        result
    }

    /// Back to byte 0, though readers were given something. They wait until their next byte has come once more.
    fn fetch_again(&self) {
        self.update(|state| state.spool = Spool::default());
    }

    /// Back to byte 0, if no reader has been given anything.
    fn start_over(&self) -> bool {
        self.update(|state| {
            if !state.released {
                state.phase = Phase::Opening;
                state.size = None;
                state.spool = Spool::default();
                state.on_tier_file = false;
            }
            !state.released
        })
    }
}
