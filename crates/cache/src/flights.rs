//! Coalescing: at most one fill of a blob, or of what a name stands for, at a time, which all requests for the blob read.
//!
//! Invariants:
//! - At most one flight per key is in the map, and a blob is kept before its flight leaves the map. So a look-up that checks the tiers again under
//!   the map's lock finds the blob, joins the flight, or is right to start one.
//! - A fill runs in a task of its own ([`Fill`]). A client that leaves ends nobody else's transfer; a panic fails the flight instead of stranding it.
//! - Unverified bytes leave only as the front of a response that cannot complete: the last [`HOLD_BACK`] bytes of every response wait until the whole
//!   blob has verified.
//! - No two flights wait for each other, on one node or on two: see [`Plan::next`].
//!
//! [`Plan::next`]: crate::plan::Plan::next

use crate::{
    absences::Absences,
    cache::Cache,
    fault::Fault,
    fill::Fill,
    plan::Step,
    reader::FlightReader,
    resource::{HOME, Key, Location, Resource, Visibility},
    spool::Spool,
    via::{Owner, SourceKind, Tier},
};
use bytes::Bytes;
use castier_blob::Digest;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{Notify, watch};

/// How much of the end of every response waits for the digest.
pub const HOLD_BACK: u64 = 64 << 10;

/// Who asks. What a peer asks for is answered from the tiers, a flight or the origin, and never by asking another peer: two nodes with different rings
/// would otherwise ask each other in a circle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Asker {
    /// A client, at the public listener; or this node itself.
    Client,
    /// Another node of the cluster.
    Peer,
}

/// All flights of this node.
#[derive(Default)]
pub(crate) struct Flights {
    map: Mutex<Map>,
    /// Flights that have not ended, in the order in which they began.
    in_progress: Mutex<BTreeMap<u64, Arc<Flight>>>,
    /// How many have begun.
    begun: AtomicU64,
}

#[derive(Default)]
struct Map {
    flights: HashMap<Key, Arc<Flight>>,
    /// The origin's.
    absences: Absences,
}

/// Whether the disk's index may still be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskIndex {
    Believe,
    /// The disk was looked at, and could not give what the index lists.
    Ignore,
}

/// What [`Cache::join`] found.
pub(crate) enum Joined {
    /// The blob has come into this part of memory meanwhile.
    Memory(Bytes, Tier),
    /// The blob has come onto the disk meanwhile.
    Disk,
    /// The origin said lately that there is no such blob.
    Absent,
    /// The blob is private, and this request may not see it before its location has said that it has the blob.
    Hidden,
    /// A flight, which this request has started or joined.
    Flight(FlightReader),
}

/// A flight as operators see it.
#[derive(Clone, Debug)]
pub struct InProgress {
    /// What is being fetched.
    pub key: Key,
    /// How much of it has come.
    pub bytes: u64,
    /// The blob's size, if it is known.
    pub size: Option<u64>,
    /// How long ago the flight began.
    pub age: Duration,
    /// How many requests read it.
    pub readers: usize,
    /// Where the bytes come from now.
    pub from: SourceKind,
}

/// One coalesced fill of one blob.
pub(crate) struct Flight {
    pub(crate) key: Key,
    /// Where it is looked for.
    pub(crate) at: Arc<dyn Location>,
    pub(crate) started: Instant,
    pub(crate) state: Mutex<State>,
    /// Told after every change of `state`.
    pub(crate) changed: watch::Sender<()>,
    /// Grows only under the map's lock, so that a flight without readers can be abandoned without a race.
    pub(crate) readers: AtomicUsize,
    /// Wakes the fill: the last reader has left, or a peer has joined.
    pub(crate) wake: Notify,
}

pub(crate) struct State {
    pub(crate) phase: Phase,
    pub(crate) spool: Spool,
    /// The blob's size as the source announced it.
    pub(crate) size: Option<u64>,
    /// Unverified bytes have been handed out, so the flight can no longer begin anew.
    pub(crate) released: bool,
    /// Where the bytes come from now.
    pub(crate) from: SourceKind,
    /// Whose the blob is, if it comes that way.
    pub(crate) owner: Owner,
    /// Who waits for the flight: a peer, as soon as one has joined.
    pub(crate) waiting: Asker,
    /// Purged, overtaken by an upload, or for one client only: the result must not be remembered.
    pub(crate) detached: bool,
    /// The spool's file is one that the disk tier will keep.
    pub(crate) in_tier_file: bool,
    /// The blob has verified, and a tier has it.
    pub(crate) kept: bool,
    /// Who may join, and who may see the blob that is kept.
    pub(crate) visibility: Visibility,
}

#[derive(Clone)]
pub(crate) enum Phase {
    /// No source has answered yet.
    Opening,
    Filling,
    Verified,
    Absent,
    Failed(Fault),
}

impl Flight {
    fn new(resource: &Resource, asker: Asker) -> Arc<Self> {
        Arc::new(Self {
            key: resource.key,
            at: resource.at.clone(),
            started: Instant::now(),
            state: Mutex::new(State {
                phase: Phase::Opening,
                spool: Spool::default(),
                size: None,
                released: false,
                from: SourceKind::Origin,
                owner: Owner::ThisNode,
                waiting: asker,
                detached: !resource.at.is_kept(),
                in_tier_file: false,
                kept: false,
                visibility: resource.at.visibility(),
            }),
            changed: watch::Sender::new(()),
            readers: AtomicUsize::new(0),
            wake: Notify::new(),
        })
    }

    /// Changes the state and tells the readers.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock());
        self.changed.send_replace(());
        result
    }

    /// A peer waits for this flight from now on.
    fn peer_joins(&self) {
        let mut state = self.state.lock();
        if state.waiting == Asker::Client {
            state.waiting = Asker::Peer;
            self.wake.notify_one();
        }
    }

    /// The bytes come from this step's source from now on.
    pub(crate) fn enter(&self, step: &Step) {
        let mut state = self.state.lock();
        (state.from, state.owner) = (step.from, step.owner);
    }

    /// Whether the fill must leave its source, because a peer waits for the flight while that source may wait for another node.
    pub(crate) fn must_leave(&self) -> bool {
        let state = self.state.lock();
        state.waiting == Asker::Peer && state.owner == Owner::Peer
    }

    pub(crate) fn waiting(&self) -> Asker {
        self.state.lock().waiting
    }

    /// Back to byte 0, although readers were given some bytes. They wait until their next byte has come once more.
    pub(crate) fn fetch_again(&self) {
        self.update(|state| state.spool = Spool::default());
    }

    /// Back to byte 0, if no reader has been given anything.
    pub(crate) fn begin_anew(&self) -> bool {
        self.update(|state| {
            if !state.released {
                state.phase = Phase::Opening;
                state.size = None;
                state.spool = Spool::default();
                state.in_tier_file = false;
            }
            !state.released
        })
    }
}

impl Map {
    /// Takes a flight out; false if it was detached, and another may have its place.
    fn take_out(&mut self, flight: &Arc<Flight>) -> bool {
        let is_current = self.flights.get(&flight.key).is_some_and(|current| Arc::ptr_eq(current, flight));
        if is_current {
            self.flights.remove(&flight.key);
        }
        is_current
    }
}

impl Flights {
    /// Whether [`Cache::join_only`] finds a flight.
    pub(crate) fn has(&self, resource: &Resource) -> bool {
        let flight = self.map.lock().flights.get(&resource.key).cloned();
        flight.is_some_and(|flight| {
            let state = flight.state.lock();
            resource.at.visibility().sees(state.visibility) && !matches!(state.phase, Phase::Absent | Phase::Failed(_))
        })
    }

    /// A flight begins; the number is for [`Self::ended`].
    pub(crate) fn began(&self, flight: &Arc<Flight>) -> u64 {
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        self.in_progress.lock().insert(number, flight.clone());
        number
    }

    pub(crate) fn ended(&self, number: u64) {
        self.in_progress.lock().remove(&number);
    }

    /// Nobody can join the flight any more.
    pub(crate) fn take_out(&self, flight: &Arc<Flight>) {
        self.map.lock().take_out(flight);
    }

    /// As [`Self::take_out`], for a flight that asked the origin. Unless a write has overtaken the flight, the blob is remembered as absent for `ttl`, among at most `most` others.
    pub(crate) fn take_out_absent(&self, flight: &Arc<Flight>, ttl: Duration, most: usize) {
        let mut map = self.map.lock();
        if map.take_out(flight)
            && let Some(digest) = flight.key.digest()
        {
            map.absences.remember(digest, ttl, most);
        }
    }

    /// Takes the flight out if nobody reads it. Nobody joins while the map is locked.
    pub(crate) fn take_out_deserted(&self, flight: &Arc<Flight>) -> bool {
        let mut map = self.map.lock();
        let deserted = flight.readers.load(Ordering::Acquire) == 0;
        if deserted {
            map.take_out(flight);
        }
        deserted
    }

    /// The size of a blob, or that it is absent, if a flight or a remembered absence tells.
    pub(crate) fn known(&self, digest: &Digest) -> Option<Option<u64>> {
        let map = self.map.lock();
        if map.absences.has(digest) {
            return Some(None);
        }
        let flight = map.flights.get(&Key::Blob(*digest))?.clone();
        drop(map);
        let state = flight.state.lock();
        match state.phase {
            _ if state.visibility == Visibility::Private => None,
            Phase::Absent if flight.at.id() == HOME => Some(None),
            Phase::Verified => Some(Some(state.spool.length())),
            _ => None,
        }
    }

    /// Whether a flight of the blob is on its way. A detached one counts too: its readers go on, and a peer may be among them.
    pub(crate) fn is_filling(&self, digest: &Digest) -> bool {
        let current = self.map.lock().flights.get(&Key::Blob(*digest)).cloned();
        let fills = |flight: &Flight| matches!(flight.state.lock().phase, Phase::Opening | Phase::Filling);
        let running = |flight: &&Arc<Flight>| flight.key == Key::Blob(*digest) && fills(flight);
        current.is_some_and(|flight| fills(&flight)) || self.in_progress.lock().values().any(|flight| running(&flight))
    }

    /// How many flights have not ended, and the oldest of them.
    pub(crate) fn in_progress(&self, most: usize) -> (usize, Vec<InProgress>) {
        let (count, oldest) = {
            let in_progress = self.in_progress.lock();
            (in_progress.len(), in_progress.values().take(most).cloned().collect::<Vec<_>>())
        };
        let oldest = oldest.iter().map(|flight| {
            let state = flight.state.lock();
            InProgress {
                key: flight.key,
                bytes: state.spool.length(),
                size: state.size,
                age: flight.started.elapsed(),
                readers: flight.readers.load(Ordering::Relaxed),
                from: state.from,
            }
        });
        (count, oldest.collect())
    }

    /// The blob was stored at the origin. An absence that is remembered, or that a flight is about to report, is no longer true.
    pub(crate) fn stored(&self, digest: &Digest) {
        // Of a flight without a byte the next source may still say that the blob is absent, and may have said so before the blob was stored.
        self.detach_if(&Key::Blob(*digest), |state| match state.phase {
            Phase::Opening | Phase::Absent => true,
            Phase::Filling => state.spool.length() == 0 && !state.released,
            Phase::Verified | Phase::Failed(_) => false,
        });
    }

    /// Nothing that is known of the blob counts any more. Requests that read a flight of it may go on.
    pub(crate) fn forget(&self, key: &Key) {
        self.detach_if(key, |_| true);
    }

    /// Everybody may join a flight of the blob from now on.
    pub(crate) fn publish(&self, digest: &Digest) {
        let flight = self.map.lock().flights.get(&Key::Blob(*digest)).cloned();
        if let Some(flight) = flight {
            flight.state.lock().visibility = Visibility::Public;
        }
    }

    fn detach_if(&self, key: &Key, which: impl Fn(&State) -> bool) {
        let mut map = self.map.lock();
        if let Some(digest) = key.digest() {
            map.absences.clear(&digest);
        }
        let Some(flight) = map.flights.get(key) else { return };
        let mut state = flight.state.lock();
        if which(&state) {
            state.detached = true;
            drop(state);
            map.flights.remove(key);
        }
    }
}

impl Cache {
    /// Joins the flight of a resource that the tiers did not have, or starts one. Counts the load.
    pub(crate) fn join(self: &Arc<Self>, resource: &Resource, asker: Asker, index: DiskIndex) -> Joined {
        let Resource { key, at } = resource;
        let sees = at.visibility();
        let mut map = self.flights.map.lock();
        if let Some(flight) = map.flights.get(key).cloned() {
            let (is_hidden, is_over) = {
                let state = flight.state.lock();
                (!sees.sees(state.visibility), matches!(state.phase, Phase::Absent | Phase::Failed(_)))
            };
            if is_hidden {
                return Joined::Hidden;
            }
            // What another location does not have, or does not give, this one may.
            if is_over && flight.at.id() != at.id() {
                map.take_out(&flight);
            } else {
                return Joined::Flight(self.follow(flight, asker));
            }
        }
        if at.id() == HOME && key.digest().is_some_and(|digest| map.absences.has(&digest)) {
            self.metrics.collapsed();
            return Joined::Absent;
        }
        // The race that this closes:
        // 1. This request looks into the tiers, and finds nothing.
        // 2. A flight keeps the blob, ends, and leaves the map.
        // 3. This request finds no flight. Without a second look it would load the blob again.
        if let Some(digest) = key.digest() {
            match self.tiers.in_memory_settled(&digest) {
                Some((_, _, visibility)) if !sees.sees(visibility) => return Joined::Hidden,
                Some((bytes, tier, _)) => return Joined::Memory(bytes, tier),
                None => {}
            }
            if index == DiskIndex::Believe && self.tiers.disk.as_ref().is_some_and(|disk| disk.offers(&digest)) {
                return Joined::Disk;
            }
        }
        let flight = Flight::new(resource, asker);
        map.flights.insert(*key, flight.clone());
        let reader = FlightReader::lead(self, flight.clone(), asker);
        drop(map);
        self.metrics.flight();
        tokio::spawn(Fill::new(self.clone(), flight).run());
        Joined::Flight(reader)
    }

    /// Joins the flight of a resource, if there is one that this request may see and that goes on, or whose result can still be read.
    pub(crate) fn join_only(self: &Arc<Self>, resource: &Resource, asker: Asker) -> Option<FlightReader> {
        let map = self.flights.map.lock();
        let flight = map.flights.get(&resource.key)?.clone();
        let may_join = {
            let state = flight.state.lock();
            resource.at.visibility().sees(state.visibility) && !matches!(state.phase, Phase::Absent | Phase::Failed(_))
        };
        may_join.then(|| self.follow(flight, asker))
    }

    /// A reader of a flight that is in the map, which the caller has locked.
    fn follow(self: &Arc<Self>, flight: Arc<Flight>, asker: Asker) -> FlightReader {
        if asker == Asker::Peer {
            flight.peer_joins();
        }
        self.metrics.collapsed();
        FlightReader::follow(self, flight, asker)
    }
}
