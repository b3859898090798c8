//! Coalescing: at most one fill of a blob at a time, which all requests for the blob read.
//!
//! Invariants:
//! - At most one flight per digest is in the map, and a blob is kept before its flight leaves the map. So a look-up that checks the tiers again under
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    flights: HashMap<Digest, Arc<Flight>>,
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
    /// A flight, which this request has started or joined.
    Flight(FlightReader),
}

/// A flight as operators see it.
#[derive(Clone, Debug)]
pub struct InProgress {
    /// What is being fetched.
    pub digest: Digest,
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
    pub(crate) digest: Digest,
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
    /// Purged, or overtaken by an upload: the result must not be remembered.
    pub(crate) detached: bool,
    /// The spool's file is one that the disk tier will keep.
    pub(crate) in_tier_file: bool,
    /// The blob has verified, and a tier has it.
    pub(crate) kept: bool,
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
    fn new(digest: Digest, asker: Asker) -> Arc<Self> {
        Arc::new(Self {
            digest,
            started: Instant::now(),
            state: Mutex::new(State {
                phase: Phase::Opening,
                spool: Spool::default(),
                size: None,
                released: false,
                from: SourceKind::Origin,
                owner: Owner::ThisNode,
                waiting: asker,
                detached: false,
                in_tier_file: false,
                kept: false,
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
        let is_current = self.flights.get(&flight.digest).is_some_and(|current| Arc::ptr_eq(current, flight));
        if is_current {
            self.flights.remove(&flight.digest);
        }
        is_current
    }
}

impl Flights {
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

    /// As [`Self::take_out`]. Unless a write has overtaken the flight, the blob is remembered as absent for `ttl`, among at most `most` others.
    pub(crate) fn take_out_absent(&self, flight: &Arc<Flight>, ttl: Duration, most: usize) {
        let mut map = self.map.lock();
        if map.take_out(flight) {
            map.absences.remember(flight.digest, ttl, most);
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
        let flight = map.flights.get(digest)?.clone();
        drop(map);
        let state = flight.state.lock();
        match state.phase {
            Phase::Absent => Some(None),
            Phase::Verified => Some(Some(state.spool.length())),
            _ => None,
        }
    }

    /// Whether a flight of the blob is on its way. A detached one counts too: its readers go on, and a peer may be among them.
    pub(crate) fn is_filling(&self, digest: &Digest) -> bool {
        let current = self.map.lock().flights.get(digest).cloned();
        let fills = |flight: &Flight| matches!(flight.state.lock().phase, Phase::Opening | Phase::Filling);
        let running = |flight: &&Arc<Flight>| flight.digest == *digest && fills(flight);
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
                digest: flight.digest,
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
        self.detach_if(digest, |state| match state.phase {
            Phase::Opening | Phase::Absent => true,
            Phase::Filling => state.spool.length() == 0 && !state.released,
            Phase::Verified | Phase::Failed(_) => false,
        });
    }

    /// Nothing that is known of the blob counts any more. Requests that read a flight of it may go on.
    pub(crate) fn forget(&self, digest: &Digest) {
        self.detach_if(digest, |_| true);
    }

    fn detach_if(&self, digest: &Digest, which: impl Fn(&State) -> bool) {
        let mut map = self.map.lock();
        map.absences.clear(digest);
        let Some(flight) = map.flights.get(digest) else { return };
        let mut state = flight.state.lock();
        if which(&state) {
            state.detached = true;
            drop(state);
            map.flights.remove(digest);
        }
    }
}

impl Cache {
    /// Joins the flight of a blob that the tiers did not have, or starts one. Counts the load.
    pub(crate) fn join(self: &Arc<Self>, digest: &Digest, asker: Asker, index: DiskIndex) -> Joined {
        let mut map = self.flights.map.lock();
        if let Some(flight) = map.flights.get(digest) {
            if asker == Asker::Peer {
                flight.peer_joins();
            }
            self.metrics.collapsed();
            return Joined::Flight(FlightReader::follow(self, flight.clone(), asker));
        }
        if map.absences.has(digest) {
            self.metrics.collapsed();
            return Joined::Absent;
        }
        // The race that this closes:
        // 1. This request looks into the tiers, and finds nothing.
        // 2. A flight keeps the blob, ends, and leaves the map.
        // 3. This request finds no flight. Without a second look it would load the blob again.
        if let Some((bytes, tier)) = self.tiers.in_memory_settled(digest) {
            return Joined::Memory(bytes, tier);
        }
        if index == DiskIndex::Believe && self.tiers.disk.as_ref().is_some_and(|disk| disk.offers(digest)) {
            return Joined::Disk;
        }
        let flight = Flight::new(*digest, asker);
        map.flights.insert(*digest, flight.clone());
        let reader = FlightReader::lead(self, flight.clone(), asker);
        drop(map);
        self.metrics.flight();
        tokio::spawn(Fill::new(self.clone(), flight).run());
        Joined::Flight(reader)
    }
}
